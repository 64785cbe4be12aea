"""`python -m fastgessl` and `accelerate launch -m fastgessl`."""

from fastgessl.cli import main

if __name__ == "__main__":
    main()
