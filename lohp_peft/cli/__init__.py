"""The command line: `lohp-peft prepare | train | generate | evaluate | push | env`."""
