"""Mutants of jobq: copies of the real code with one rule broken, which at least one test must notice.

mutations   which rule, by which change of the text, and the tests that are to fail
__main__    makes the copy, runs the tests, prints the table: `python3 dev.py mutants [NAME ...]`
"""
