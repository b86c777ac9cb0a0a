"""What the tests of this folder may ask for beside the fixtures of all tests."""

from tests.shared_database import shared_database, shared_database_url

__all__ = ["shared_database", "shared_database_url"]
