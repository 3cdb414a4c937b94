"""Tables and tars of tagged posts: reading them, counting their hashtags."""
