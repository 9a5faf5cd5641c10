"""``python -m sdconv``: the same as the ``sdconv`` command."""

from sdconv.cli import main

if __name__ == "__main__":
    main()
