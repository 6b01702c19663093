"""The entry point of `ijepa`, which is the same as `python -m ijepa_enhanced`."""

import sys

from ijepa_enhanced.commands.interrupts import end_at_interrupt


def main() -> int:
    """Run the command and return its exit code."""
    end_at_interrupt()
    from ijepa_enhanced.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
