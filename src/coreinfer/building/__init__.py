"""Stores made from a corpus: what prefills it, in passes that go on where they were cut off."""
