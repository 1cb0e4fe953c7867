"""The `qlip` command: parses, calls qlip_core, prints."""
