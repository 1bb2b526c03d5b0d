// Starts `effc lsp` for recipes; all that an editor shows comes from there.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

function activate() {
  const settings = workspace.getConfiguration("effc");
  const [command, ...args] = settings.get("command");
  client = new LanguageClient(
    "effc",
    "effc",
    { command, args },
    {
      documentSelector: [{ language: "effspec" }],
      initializationOptions: { plan: settings.get("hints.plan"), defaults: settings.get("hints.defaults") },
      synchronize: { fileEvents: workspace.createFileSystemWatcher("**/*.effspec") },
    },
  );
  return client.start();
}

function deactivate() {
  return client ? client.stop() : undefined;
}

module.exports = { activate, deactivate };
