/**
 * The one piece of WebAssembly that is used: page-aligned memory for O_DIRECT. Node has it, @types/node
 * does not declare it, and the "dom" library would bring in a browser's globals.
 */
declare namespace WebAssembly {
  interface MemoryDescriptor {
    /** In pages of 64 KiB. */
    readonly initial: number;
    readonly maximum?: number;
    readonly shared?: boolean;
  }
  class Memory {
    constructor(descriptor: MemoryDescriptor);
    readonly buffer: ArrayBuffer;
  }
}
