"""``sipit-lite`` or ``python -m sipit_lite``: light, so that Ctrl-C is heard."""

import os
import sys


def main() -> int:
    """Run the command line; Ctrl-C is one line while its imports run as well."""
    # Threads of torch wait for each other by spinning, 14 ms each time as a rule, which
    # takes 20 times as long where another program runs on one of two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for name in [name for name in os.environ if name.startswith("TQDM_")]:
        del os.environ[name]  # tqdm ends the program at a malformed one
    try:
        from sipit_lite import cli  # takes seconds: torch, transformers

        return cli.main()
    except ValueError as error:  # while huggingface_hub reads its settings
        print(f"sipit-lite: got {error}; is HF_ENDPOINT an address?", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sipit-lite: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
