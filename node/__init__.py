"""One running node: configuration, daemon, command line, tickets, control socket."""
