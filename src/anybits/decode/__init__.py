"""Decoding that uses several precisions of one model: drafts from few planes, and schedules (docs/dynamic.md)."""
