"""Where teachers' autograders look for the report to Classroom 50."""

import sys

from harness.report.classroom50 import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
