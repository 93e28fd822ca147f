"""One TOML into the tables that the packages own."""
