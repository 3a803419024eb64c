import sys

from agent_r1.cli import main

if __name__ == "__main__":
    sys.exit(main())
