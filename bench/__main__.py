"""`python -m bench`: the exit status, and errors in a line."""

import io
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """The exit status: of the command; 2 for what cannot be done, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no × in the terminal's encoding is no reason to stop
    try:
        from .options import perform  # imports torch, which takes seconds, and tribp, which reads TRIBP_BACKEND

        status = perform(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has enough; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
