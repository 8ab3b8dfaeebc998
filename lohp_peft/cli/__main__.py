"""`python -m lohp_peft.cli`, for `accelerate launch -m lohp_peft.cli train ...`."""

from lohp_peft.cli.main import main

if __name__ == "__main__":
    main()
