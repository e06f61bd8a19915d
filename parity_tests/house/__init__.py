"""The project itself: folders, README, docs, wheel."""
