"""One runnable page for each family of algorithms, in plain torch: start with `ldrl.py`."""
