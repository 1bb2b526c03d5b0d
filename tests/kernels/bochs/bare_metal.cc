// What the kernels need of a system, on a machine without one, and the program that the reset code calls.
#include "products.h"

extern "C" {
// The compiler calls these by name. Written in assembly: as a loop it would make them call themselves.
void* memcpy(void* to, const void* from, size_t bytes) {
  void* at = to;
  __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}
void* memset(void* to, int value, size_t bytes) {
  void* at = to;
  __asm__ volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
  return to;
}
void* memmove(void* to, const void* from, size_t bytes) {
  if (to <= from) return memcpy(to, from, bytes);
  auto* last = static_cast<uint8_t*>(to) + bytes - 1;
  auto* source = static_cast<const uint8_t*>(from) + bytes - 1;
  __asm__ volatile("std\n\trep movsb\n\tcld" : "+D"(last), "+S"(source), "+c"(bytes) : : "memory");
  return to;
}
int memcmp(const void* a, const void* b, size_t bytes) {
  auto *one = static_cast<const volatile uint8_t*>(a), *other = static_cast<const volatile uint8_t*>(b);
  for (; bytes > 0; --bytes, ++one, ++other)
    if (*one != *other) return *one - *other;
  return 0;
}
}

void effc_parallel(int parts, void (*body)(int, int, void*), void* context) {
  for (int part = 0; part < parts; ++part) body(part, parts, context);
}

void* effc_scratch(int slot, size_t bytes) {
  constexpr size_t kBytes = 1 << 20;
  alignas(64) static uint8_t slots[4][kBytes];
  return bytes <= kBytes ? slots[slot] : nullptr;
}

namespace {

// The emulator shows what is written to this port.
void put_character(char one) { __asm__ volatile("outb %0, %1" : : "a"(one), "Nd"(uint16_t{0xe9})); }

void put_text(const char* text) {
  for (; *text; ++text) put_character(*text);
}

void put_line(const char* name, int32_t status, uint64_t value) {
  put_text(name);
  put_character(' ');
  put_character(static_cast<char>('0' + status));
  put_character(' ');
  for (int shift = 60; shift >= 0; shift -= 4) put_character("0123456789abcdef"[value >> shift & 15]);
  put_character('\n');
}

Memory memory;

}  // namespace

EFFC_API int32_t effc_machine_level();

extern "C" void run() {
  put_line("level", kOk, static_cast<uint64_t>(effc_machine_level()));
  every_kernel(memory, put_line);
  put_text("end\n");
}
