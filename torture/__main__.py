import sys

from torture.machine import main

if __name__ == "__main__":
    sys.exit(main())
