"""Many servers as one deployment of Ray Serve. Ray is imported here alone."""
