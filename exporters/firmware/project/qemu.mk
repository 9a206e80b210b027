
# make qemu: run the self test on a bare @core@ in QEMU
build/@name@.elf: $(wildcard qemu/*) test/@name@_test.c $(SOURCES) | build
	@compiler@ @flags@ -O2 -Isrc -Iqemu $(wildcard qemu/*.c) test/@name@_test.c $(SOURCES) \
	  @linking@ -o $@

qemu: build/@name@.elf
	@emulator@ -kernel $<

.PHONY: qemu
