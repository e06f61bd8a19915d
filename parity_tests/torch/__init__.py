"""Tests of osd_torch only."""
