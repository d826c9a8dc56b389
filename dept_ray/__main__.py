"""`python -m dept_ray`: the command line."""

from dept_ray.cli import main

main()
