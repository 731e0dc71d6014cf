"""Run the command line: `raekit`, `python -m raekit`, or `torchrun --nproc-per-node N -m raekit -- COMMAND ...`.

The two dashes are needed, because torchrun would take `--run` as an abbreviation of its own option `--run-path`.
"""

import sys


def main() -> None:
    """Run the command in sys.argv. Ctrl-C during the imports ends it silently, too."""
    try:
        from raekit import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
