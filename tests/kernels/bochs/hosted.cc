// The same products over the model of tiles.
#include "products.h"

#include <cstdio>

int main() {
  static Memory memory;
  every_kernel(memory, [](const char* name, int32_t status, uint64_t hash) {
    std::printf("%s %c %016llx\n", name, '0' + status, static_cast<unsigned long long>(hash));
  });
  std::printf("end\n");
}
