"""The verbs by what they are for, as help lists them."""

SECTIONS = {
    "Write": ("check", "fmt", "new", "import", "explain", "lsp", "passes", "recipes", "add", "update", "vendor"),
    "Build": ("tune", "lock", "plan", "compile", "pick"),
    "Use": ("run", "serve", "federate", "test", "bisect", "diff", "inspect", "report", "verify", "sign"),
    "Care": ("cache", "doctor", "bench"),
}
