"""Where the workflows of students' repositories look for `collect`."""

import sys

from harness.commands.collect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
