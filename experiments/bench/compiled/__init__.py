"""What compilers make of programs, which are not run."""
