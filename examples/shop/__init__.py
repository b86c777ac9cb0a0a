"""A small web shop whose receipts and bookings are jobs.

    models      the tables
    database    the engine, and sessions on it
    jobs        what happens after an order: a mail, and a line in the ledger
    orders      taking an order: its row and its jobs in one transaction
    web         the HTTP side

It takes two programs more than a shop without jobs: `jobq relay`, and `jobq worker shop.jobs:jobs`.
`jobq demo` runs all of it and breaks what it can.
"""
