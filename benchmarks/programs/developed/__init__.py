"""The developed half: programs and loops in whose sight the checks were made."""
