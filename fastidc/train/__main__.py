"""`python -m fastidc.train`; see `fastidc.train.official`."""

import sys

from fastidc.train.official import main

if __name__ == "__main__":
    sys.exit(main())
