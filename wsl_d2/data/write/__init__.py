"""Images and hashtags -> shards; verification; views."""
