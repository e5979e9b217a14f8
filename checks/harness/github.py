"""Where the workflows of students' repositories look for the report to GitHub."""

import sys

from harness.report.github import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
