"""The languages that clients speak, a file each: requests become a ``Call``, turns an answer."""
