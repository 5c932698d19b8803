"""`python -m sparseprune`."""

from sparseprune.cli import main

if __name__ == "__main__":
    main()
