// Calls functions of the kernels' library for a process of another processor: `library.py` sends names, arguments and
// memory to standard input, and reads answers and memory from standard output. All numbers are little-endian.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr size_t kIntegers = 40, kFloats = 4, kPage = 4096;

[[noreturn]] void end(const char* reason) {
  std::fprintf(stderr, "%s\n", reason);
  std::exit(reason[0] ? 1 : 0);
}

void receive(void* at, size_t bytes) {
  if (bytes && std::fread(at, 1, bytes, stdin) != bytes) end(std::feof(stdin) ? "" : "the request can't be read");
}

template <class T>
T receive() {
  T value;
  receive(&value, sizeof value);
  return value;
}

// Memory whose last byte, but for what lies up to a multiple of 64, is that of a page that nothing may be read behind.
struct Memory {
  uint8_t *pages, *at;
  size_t bytes, mapped;
  explicit Memory(size_t bytes) : bytes(bytes) {
    const size_t whole = (bytes + 63) / 64 * 64, room = (whole + kPage - 1) / kPage * kPage;
    mapped = room + kPage;
    void* all = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) end("there is no memory for an argument");
    pages = static_cast<uint8_t*>(all);
    mprotect(pages + room, kPage, PROT_NONE);
    at = pages + room - whole;
  }
};

// As this processor's procedure calls have it, integers and pointers beyond eight lie on the stack, eight bytes each,
// and up to eight floats lie in registers of their own: so one call passes the arguments of any function.
template <size_t... I>
int32_t call(void* function, const int64_t* values, const float* floats, std::index_sequence<I...>) {
  using Function = int32_t (*)(decltype(I, int64_t())..., float, float, float, float);
  return reinterpret_cast<Function>(function)(values[I]..., floats[0], floats[1], floats[2], floats[3]);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) end(dlerror());
  for (;;) {
    std::string name(receive<uint32_t>(), ' ');
    receive(name.data(), name.size());
    const bool keep = receive<uint32_t>();
    std::vector<Memory> memories;
    for (auto count = receive<uint32_t>(); count; --count) {
      memories.emplace_back(receive<uint64_t>());
      receive(memories.back().at, memories.back().bytes);
    }
    const auto address = [&] {
      const auto memory = receive<uint32_t>();
      return reinterpret_cast<int64_t>(memories.at(memory).at + receive<uint64_t>());
    };
    for (auto count = receive<uint32_t>(); count; --count) {  // pointers that lie in memory
      const int64_t where = address(), target = address();
      std::memcpy(reinterpret_cast<void*>(where), &target, 8);
    }
    int64_t values[kIntegers] = {};
    float floats[kFloats] = {};
    size_t value = 0, number = 0;
    for (auto count = receive<uint32_t>(); count; --count) {
      const auto kind = receive<uint32_t>();
      if (value == kIntegers || number == kFloats) end("a function has more arguments than can be passed");
      if (kind == 0) values[value++] = receive<int64_t>();
      if (kind == 1) floats[number++] = receive<float>();
      if (kind == 2) values[value++] = address();
    }
    void* function = dlsym(library, name.c_str());
    if (!function) end("the library lacks the function");
    const int32_t status = call(function, values, floats, std::make_index_sequence<kIntegers>());
    std::fwrite(&status, 4, 1, stdout);
    for (const Memory& memory : memories) {
      std::fwrite(memory.at, 1, memory.bytes, stdout);
      if (!keep) munmap(memory.pages, memory.mapped);
    }
    std::fflush(stdout);
  }
}
