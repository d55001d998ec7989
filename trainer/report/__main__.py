"""`python -m trainer.report`."""

import sys

from trainer.report.sections import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
