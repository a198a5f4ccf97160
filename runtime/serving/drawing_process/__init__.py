"""The process that draws: started by the HTTP process, fed over pipes, replaced when it dies."""
