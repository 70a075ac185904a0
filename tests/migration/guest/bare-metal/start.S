/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the processor's reset vector to C: 64 bits, flat, without interrupts, and in user mode.
 *
 * User mode, with the right to use ports, since a hypervisor without hardware for it interprets
 * what a kernel does, but lets user code run by itself. There only are its writes to memory real
 * ones, that are seen because of write-protected pages.
 */

	/* The stack grows down from here; a page is more than enough. */
	.set STACK_TOP, 0x9000
	/* Where link.ld puts .start in the 64 KiB that the code segment begins with. */
	.set START, 0xff00

	.set CR0_PE, 0x00000001
	.set CR0_ET, 0x00000010
	.set CR0_PG, 0x80000000
	.set CR4_PAE, 0x20
	.set MSR_EFER, 0xc0000080
	.set EFER_LME, 0x100
	/* Ports may be used in user mode; the other bit is always 1. */
	.set EFLAGS_IOPL, 0x3002

	.set CODE, 0x08
	.set DATA, 0x10
	.set CODE_64, 0x18
	.set USER_DATA, 0x20 | 3
	.set USER_CODE, 0x28 | 3

	.section .reset, "ax"
	.code16
	.globl reset
reset:
	jmp start

	.section .start, "ax"
start:
	cli
	cld
	lgdtl %cs:(START + gdt_pointer - start)
	/* Without CD and NW, which are set at a reset. */
	movl $(CR0_PE | CR0_ET), %eax
	movl %eax, %cr0
	ljmpl $CODE, $protected_mode

	.balign 8
gdt:
	.quad 0
	.quad 0x00cf9b000000ffff
	.quad 0x00cf93000000ffff
	.quad 0x00af9b000000ffff
	.quad 0x00cff3000000ffff
	.quad 0x00affb000000ffff
gdt_pointer:
	.word gdt_pointer - gdt - 1
	.long gdt

	.text
	.code32
protected_mode:
	movl $DATA, %eax
	movl %eax, %ss
	movl $STACK_TOP, %esp
	movl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $level4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	movl $EFER_LME, %eax
	xorl %edx, %edx
	wrmsr
	movl $(CR0_PG | CR0_PE | CR0_ET), %eax
	movl %eax, %cr0
	ljmpl $CODE_64, $long_mode

	.code64
long_mode:
	movl $USER_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	pushq %rax
	/* As if called: the stack is 16 bytes off by 8. */
	pushq $(STACK_TOP - 8)
	pushq $EFLAGS_IOPL
	pushq $USER_CODE
	leaq bare_metal(%rip), %rax
	pushq %rax
	iretq

	/*
	 * The first 4 GiB, one to one, in pages of 2 MiB. Accessed and dirty are set already, so that
	 * nobody has to write here.
	 */
	.set TABLE, 0x27
	.set LARGE_PAGE, 0xe7

	.section .tables, "a"
	.balign 4096
level4:
	.quad level3 + TABLE
	.fill 511, 8, 0
level3:
	.quad level2 + TABLE
	.quad level2 + 0x1000 + TABLE
	.quad level2 + 0x2000 + TABLE
	.quad level2 + 0x3000 + TABLE
	.fill 508, 8, 0
level2:
	.set page, 0
	.rept 2048
	.quad page + LARGE_PAGE
	.set page, page + 0x200000
	.endr
