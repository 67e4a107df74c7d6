"""`nabla-tau`, also as `python -m nabla_tau`: the command line where it was installed, and how to where it was not."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from nabla_tau import cli
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        print("nabla-tau: the command line needs jsonargparse: pip install 'nabla_tau[cli]'", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
