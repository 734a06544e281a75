"""Speed, memory and balance studies. Run them with ``python -m bench``; see ``bench/README.md``."""
