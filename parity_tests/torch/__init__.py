"""What is special to osd_torch."""
