"""What ships besides the program: pages, dashboards and alerts as code, manifests. It may import all packages; none imports it."""
