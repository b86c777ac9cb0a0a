"""The shop's tests. `pytest examples/shop/tests` needs no servers: they start their own."""
