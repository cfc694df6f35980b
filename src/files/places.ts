/** From what a person types to a file system and a path in it. Pure. */
import { B2Error } from '../errors.js';
import { normalPath, showName } from './names.js';
import type { FoundFileSystem, Place } from './types.js';

/**
 * `VOLUME[:PATH]`; the path is undefined without a colon. A volume whose name has colons is known by its name; any other ends at
 * the first one.
 */
export function splitVolumePath(
  text: string,
  volumeNames: readonly string[] = [],
): { readonly volume: string; readonly path?: string } {
  const longest = volumeNames
    .filter((name) => text === name || text.startsWith(`${name}:`))
    .sort((a, b) => b.length - a.length)[0];
  const end = longest?.length ?? text.indexOf(':');
  return end < 0 || end === text.length
    ? { volume: text }
    : { volume: text.slice(0, end), path: text.slice(end + 1) };
}

/** The file systems that `text` names: by name, else by label, else by UUID. */
function named(fileSystems: readonly FoundFileSystem[], text: string): readonly FoundFileSystem[] {
  for (const key of ['name', 'label', 'uuid'] as const) {
    const found = fileSystems.filter((f) => f[key] === text);
    if (found.length > 0) return found;
  }
  return [];
}

/** `p1 (ext4 "boot"), p2 (xfs)`. */
export function describeFileSystems(fileSystems: readonly FoundFileSystem[]): string {
  return fileSystems
    .map((f) => `${f.name} (${f.type}${f.label === undefined ? '' : ` "${showName(f.label)}"`})`)
    .join(', ');
}

/** Whether the text has the form of one that names a file system, which may not be there. */
export function namesFileSystem(text: string): boolean {
  return text.indexOf(':') > 0 && !text.startsWith('/');
}

/** A place whose file system is named before a colon; undefined where the text is of another form. */
export function explicitPlace(
  fileSystems: readonly FoundFileSystem[],
  text: string,
): Place | undefined {
  if (!namesFileSystem(text)) return undefined;
  const colon = text.indexOf(':');
  const selector = text.slice(0, colon);
  const found = named(fileSystems, selector);
  const [fileSystem] = found;
  if (fileSystem === undefined) return undefined;
  if (found.length > 1) {
    throw new B2Error(
      'usage',
      `"${selector}" can mean ${found.length} file systems: ${describeFileSystems(found)}`,
      { hint: 'Use the name of the partition.' },
    );
  }
  return { fileSystem, path: normalPath(text.slice(colon + 1)) };
}

/** What FileAccess.place promises, once every file system is known. */
export function findPlace(
  fileSystems: readonly FoundFileSystem[],
  text: string,
): Place | undefined {
  const explicit = explicitPlace(fileSystems, text);
  if (explicit !== undefined) return explicit;
  const path = normalPath(text);
  const [only] = fileSystems;
  if (only !== undefined && fileSystems.length === 1) return { fileSystem: only, path };
  if (path === '/') return undefined;
  const fileSystem = fileSystems.find(
    (f) => path === `/${f.name}` || path.startsWith(`/${f.name}/`),
  );
  if (fileSystem !== undefined)
    return { fileSystem, path: normalPath(path.slice(fileSystem.name.length + 1)) };
  throw new B2Error('not-found', `no file system of that image is meant by "${showName(text)}"`, {
    hint:
      fileSystems.length === 0
        ? 'No file system was found in it.'
        : `It has several: ${describeFileSystems(fileSystems)}. Put one before the path: ${fileSystems[0]?.name}:/etc/fstab.`,
  });
}
