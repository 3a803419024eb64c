"""The command line: ``boundary`` has its beginning and its end, ``parser`` its words."""
