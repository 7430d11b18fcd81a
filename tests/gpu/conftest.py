"""What pytest must not import here: the device is registered with torch for good, so it has a process of its own."""

collect_ignore = ["audit.py", "far_device.py"]
