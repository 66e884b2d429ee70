"""``sipit-lite`` or ``python -m sipit_lite``: Ctrl-C is heard from the start."""

import sys

try:
    from sipit_lite.cli import main
except KeyboardInterrupt:
    print("sipit-lite: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
