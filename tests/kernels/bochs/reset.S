# From the reset vector to C++ in long mode. The ROM is 2 MiB and ends at 4 GiB, where a processor begins:
# there is no BIOS under it, no boot loader and no kernel. The payload is copied to RAM and runs there.

        .section .rom, "ax"
rom:    .code16
real:   cli
        cld
        lgdtl   %cs:(descriptors_at - rom)      # cs begins at 0xffff0000
        mov     %cr0, %eax
        and     $0x9fffffff, %eax               # caches on: CD, NW
        or      $1, %eax                        # PE
        mov     %eax, %cr0
        ljmpl   $0x08, $protected

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        in      $0x92, %al                      # all address lines
        or      $2, %al
        out     %al, $0x92
        mov     $payload_in_rom, %esi
        mov     $payload_begin, %edi
        mov     $payload_words, %ecx
        rep     movsl
        xor     %eax, %eax
        mov     $zeros_begin, %edi
        mov     $zeros_words, %ecx
        rep     stosl
        # Every address as itself, in pages of 1 GiB: the last holds this ROM.
        mov     $0x10000, %edi
        mov     $0x800, %ecx
        rep     stosl
        movl    $0x11003, 0x10000
        movl    $0x00000083, 0x11000
        movl    $0x40000083, 0x11008
        movl    $0x80000083, 0x11010
        movl    $0xc0000083, 0x11018
        mov     $0x10000, %eax
        mov     %eax, %cr3
        mov     $0x40620, %eax                  # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
        mov     %eax, %cr4
        mov     $0xc0000080, %ecx               # EFER: LME
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     $0x80000033, %eax               # PG, NE, ET, MP, PE
        mov     %eax, %cr0
        ljmp    $0x18, $long_mode

        .balign 8
descriptors:
        .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
descriptors_at:
        .word   . - descriptors - 1
        .long   descriptors

        .org    0xfff0
        .code16
        jmp     real
        .org    0x10000

        .section .start, "ax"
        .globl  long_mode
        .code64
long_mode:
        mov     $stack_end, %rsp
        xor     %ecx, %ecx
        xor     %edx, %edx
        mov     $0x600e7, %eax                  # XCR0: x87, SSE, AVX, AVX-512, tile shapes, tiles
        xsetbv
        call    run
        mov     $0x8900, %dx                    # where the emulator waits for this word
        mov     $shutdown, %esi
        mov     $8, %ecx
        rep     outsb
1:      hlt
        jmp     1b
shutdown:
        .ascii  "Shutdown"
