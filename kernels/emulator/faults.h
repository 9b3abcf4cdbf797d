// Accesses where no memory is, which end a launch as they do on a GPU, and not the process.

#pragma once

#include <csignal>

#include "block.h"

namespace cuemu __attribute__((visibility("hidden"))) {

  // While it lives; but not where a sanitizer says more of it.
  class Faults {
   public:
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    Faults() {
      struct sigaction action = {};
      action.sa_sigaction = [](int, siginfo_t* fault, void*) {
        if (!block.current) std::abort();
        give_up("thread %u accesses %p, where no memory is", block.current->linear, fault->si_addr);
      };
      action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler never returns: it leaves the fiber
      sigaction(SIGSEGV, &action, &before_);
    }
    ~Faults() { sigaction(SIGSEGV, &before_, nullptr); }

   private:
    struct sigaction before_;
#else
    Faults() {}
#endif
  };

}  // namespace cuemu
