// Says why a process ends that reads a mapped file which somebody made shorter. The system has no page for what it reads
// and sends SIGBUS, which would end it without a word; nothing can be computed from there, so it ends all the same.
#include <signal.h>
#include <unistd.h>

#include "levels.h"

namespace {

constexpr int kEnvironment = 5;  // the exit code of `EXITS` in dsl/syntax/diagnostics.py
constexpr char kSentence[] =
    "error[file-cut]: a file that was mapped became shorter while it was read, or its disk can't be read\n"
    "help: a model or an artifact was changed while it was used; run this again once nothing writes to it\n";

// Calls only what POSIX lets a handler call: `write`, `_exit`, `signal` and `raise`.
void end(int, siginfo_t* fact, void*) {
  if (fact->si_code == BUS_ADRERR) {
    if (write(STDERR_FILENO, kSentence, sizeof kSentence - 1)) {}  // where nobody reads, the exit code has to do
    _exit(kEnvironment);
  }
  signal(SIGBUS, SIG_DFL);  // sent by somebody, or another fault: as if nobody listened
  raise(SIGBUS);
}

}  // namespace

// Leaves a handler of somebody else alone, as Python's faulthandler or a sanitizer.
EFFC_API int32_t effc_watch_mapped_files() {
  struct sigaction known = {};
  if (sigaction(SIGBUS, nullptr, &known) || (known.sa_flags & SA_SIGINFO) || known.sa_handler != SIG_DFL) return kOk;
  struct sigaction ours = {};
  ours.sa_sigaction = end;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
  return kOk;
}
